-- The changed task and its key, or no row. $2: its id, $3: the versions to change, or null for any. Then for each field of
-- a task, in their order, whether to set it, and to what.
UPDATE task
SET title = CASE WHEN $4 THEN $5 ELSE title END,
    description = CASE WHEN $6 THEN $7 ELSE description END,
    completed = CASE WHEN $8 THEN $9 ELSE completed END,
    updated_at = CASE
        WHEN true IN ($4, $6, $8) THEN greatest(now(), updated_at + interval '1 microsecond')
        ELSE updated_at
    END
WHERE user_id = $1
  AND id = $2
  AND coalesce({version} = ANY($3::text[]), true)
  AND {lock_timeout}
RETURNING {task}, {key}
