-- The task that an Idempotency-Key has made, with the hash of that request, or no row. $2: the call, $3: the key.
SELECT {task}, request_hash, $2::int AS call
FROM task
WHERE user_id = $1
  AND idempotency_key = $3
