-- One task of the caller, or no row. $2: the number of the call in its batch, $3: the id.
SELECT {task}, $2::int AS call
FROM task
WHERE user_id = $1
  AND id = $3
