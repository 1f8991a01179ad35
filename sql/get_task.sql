-- One task of the caller, or no row. $2: its id.
SELECT {task}
FROM task
WHERE user_id = $1
  AND id = $2
