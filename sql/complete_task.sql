-- The changed task, or no row. $2: its id, $3: the value of completed, or null to toggle it, $4: see update_task.sql.
UPDATE task
SET completed = coalesce($3, NOT completed),
    updated_at = greatest(now(), updated_at + interval '1 microsecond')
WHERE user_id = $1
  AND id = $2
  AND coalesce({version} = ANY($4::text[]), true)
RETURNING {task}
