-- The changed task, or no row. $2: the number of the call, $3: the id, $4: the versions that may be
-- changed, or null for any, $5: the value of completed, or null to toggle it. updated_at is as in update_task.sql.
UPDATE task
SET completed = coalesce($5, NOT completed),
    updated_at = greatest(now(), (updated_at AT TIME ZONE 'UTC' + interval '1 microsecond') AT TIME ZONE 'UTC')
WHERE user_id = $1
  AND id = $3
  AND coalesce(updated_at = ANY($4), true)
RETURNING {task}, $2::int AS call
