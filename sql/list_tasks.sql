-- A JSON array of the caller's tasks, newest first. {status} is one of STATUSES, see __init__.py.
SELECT format('[%s]', string_agg(item, ', '))
FROM (
    SELECT {task} AS item
    FROM task
    WHERE user_id = $1
      AND {status}
    ORDER BY created_at DESC, id DESC
) AS items
