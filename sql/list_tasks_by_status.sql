-- A page of the caller's tasks that are completed, or of those that are not. As list_tasks.sql, and $6: completed.
-- One statement for both would need an OR, which keeps PostgreSQL from reading an index in this order.
SELECT {task}, $2::int AS call
FROM task
WHERE user_id = $1
  AND completed = $6
  AND (created_at, id) < ($3, $4)
ORDER BY created_at DESC, id DESC
LIMIT $5
