-- The changed task and its key, or no row. $2: its id, $3: see update_task.sql, $4: the value of completed, or null to
-- toggle it.
UPDATE task
SET completed = coalesce($4, NOT completed),
    updated_at = greatest(now(), updated_at + interval '1 microsecond')
WHERE user_id = $1
  AND id = $2
  AND coalesce({version} = ANY($3::text[]), true)
  AND {lock_timeout}
RETURNING {task}, {key}
