-- A page of the caller's tasks, newest first. $2: the number of the call, $3 and $4: created_at and id of the last
-- task of the page before, $5: how many tasks at most.
SELECT {task}, $2::int AS call
FROM task
WHERE user_id = $1
  AND (created_at, id) < ($3, $4)
ORDER BY created_at DESC, id DESC
LIMIT $5
