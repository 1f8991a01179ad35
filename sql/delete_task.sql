-- The key of the deleted task, or no row. $2: its id, $3: see update_task.sql.
DELETE FROM task
WHERE user_id = $1
  AND id = $2
  AND coalesce({version} = ANY($3::text[]), true)
  AND {lock_timeout}
RETURNING {key}
