-- The new task and its id. $2: null, or an Idempotency-Key, a space, and the hash of what it came with. Then the fields
-- of a task, in their order. The same $2 again, even at the same time, gives the task that it made, and the same
-- key with another hash no row. The update changes nothing, but lets RETURNING see that task.
INSERT INTO task (user_id, idempotency_key, title, description, completed)
VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (user_id, split_part(idempotency_key, ' ', 1)) WHERE idempotency_key IS NOT NULL
DO UPDATE SET idempotency_key = excluded.idempotency_key
WHERE task.idempotency_key = excluded.idempotency_key
RETURNING {task}, id
