-- The id of the deleted task, or no row. $2: its id.
DELETE FROM task
WHERE user_id = $1
  AND id = $2
RETURNING id
