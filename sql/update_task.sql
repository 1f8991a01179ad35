-- The changed task, or no row. $2: its id, $3: title, $4: whether to set the description, $5: to what (null clears it),
-- $6: completed. A null $3 or $6 keeps what is there, which is safe because neither column can be null.
-- $7: the versions to change, or null for any.
UPDATE task
SET title = coalesce($3::text, title),
    description = CASE WHEN $4::boolean THEN $5::text ELSE description END,
    completed = coalesce($6::boolean, completed),
    updated_at = CASE
        WHEN $3 IS NULL AND NOT $4 AND $6 IS NULL THEN updated_at
        ELSE greatest(now(), updated_at + interval '1 microsecond')
    END
WHERE user_id = $1
  AND id = $2
  AND coalesce({version} = ANY($7::text[]), true)
RETURNING {task}
