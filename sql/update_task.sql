-- The changed task, or no row. $2: the number of the call, $3: the id, $4: the versions that may be changed, or null
-- for any. Then for each field of a task, in their order, whether to set it, and to what. updated_at moves on by a
-- microsecond at least. AT TIME ZONE is for Citus, which takes only IMMUTABLE functions of a column in SET:
-- timestamptz + interval is none.
UPDATE task
SET title = CASE WHEN $5 THEN $6 ELSE title END,
    description = CASE WHEN $7 THEN $8 ELSE description END,
    completed = CASE WHEN $9 THEN $10 ELSE completed END,
    updated_at = greatest(now(), (updated_at AT TIME ZONE 'UTC' + interval '1 microsecond') AT TIME ZONE 'UTC')
WHERE user_id = $1
  AND id = $3
  AND coalesce(updated_at = ANY($4), true)
RETURNING {task}, $2::int AS call
