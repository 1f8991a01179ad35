-- The new task, or no row where the key has made one before. $2: the number of the call, $3: an Idempotency-Key or null,
-- $4: the hash of the request that it came with. Then the fields of a task, in their order.
INSERT INTO task (user_id, idempotency_key, request_hash, title, description, completed)
VALUES ($1, $3, $4, $5, $6, $7)
ON CONFLICT (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
RETURNING {task}, $2::int AS call
