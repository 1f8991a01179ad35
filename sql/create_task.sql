-- The new task and its id. $2: title, $3: description or null, $4: completed, $5: null, or an Idempotency-Key, a space,
-- and the hash of what it came with. The same $5 again gives the task that it made, whoever is first, and the same key
-- with another hash no row.
INSERT INTO task (user_id, title, description, completed, idempotency_key)
VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (user_id, split_part(idempotency_key, ' ', 1)) WHERE idempotency_key IS NOT NULL
DO UPDATE SET idempotency_key = excluded.idempotency_key
WHERE task.idempotency_key = excluded.idempotency_key
RETURNING {task}, id
