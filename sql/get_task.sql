-- One task of the caller, or null. $2: its id.
SELECT (
    SELECT {task}
    FROM task
    WHERE user_id = $1
      AND id = $2
)
