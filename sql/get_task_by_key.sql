-- The task that an Idempotency-Key has made, and whether by the same request, or no row. $2: the number of the
-- call, $3: the key, $4: the hash of the request.
SELECT {task}, request_hash = $4 AS same_request, $2::int AS call
FROM task
WHERE user_id = $1
  AND idempotency_key = $3
