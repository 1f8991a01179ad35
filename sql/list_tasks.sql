-- A JSON array of the caller's tasks, newest first. $2: which values of `completed` to list.
SELECT format('[%s]', string_agg(item, ', '))
FROM (
    SELECT {task} AS item
    FROM task
    WHERE user_id = $1
      AND completed = ANY($2::boolean[])
    ORDER BY created_at DESC, id DESC
) AS items
