-- The deleted task, or no row. $2, $3 and $4: as in update_task.sql.
DELETE FROM task
WHERE user_id = $1
  AND id = $3
  AND coalesce(updated_at = ANY($4), true)
RETURNING {task}, $2::int AS call
