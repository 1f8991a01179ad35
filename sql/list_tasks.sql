-- The caller's tasks, newest first, as bytes of JSON: a list may be long, and needs no copy then on its way to the
-- client. {status} is a condition, one of the values of STATUSES in __init__.py.
SELECT convert_to(format('{"items": [%s]}', string_agg(item, ', ')), 'UTF8')
FROM (
    SELECT {task} AS item
    FROM task
    WHERE user_id = $1
      AND {status}
    ORDER BY created_at DESC, id DESC
) AS items
