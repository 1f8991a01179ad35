-- The deleted task, or no row. $2: the number of the call, $3: the id, $4: the versions that may be
-- deleted, or null for any.
DELETE FROM task
WHERE user_id = $1
  AND id = $3
  AND coalesce(updated_at = ANY($4), true)
RETURNING {task}, $2::int AS call
