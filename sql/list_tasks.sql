-- The caller's tasks, newest first, as bytes of JSON, each task after a comma but the first, or null if there are none.
-- They are bytes because a list may be long: text would be decoded, only to be encoded again for the client. {status} is
-- a condition, one of the values of STATUSES in __init__.py.
SELECT convert_to(string_agg(item, ', '), 'UTF8')
FROM (
    SELECT {task} AS item
    FROM task
    WHERE user_id = $1
      AND {status}
    ORDER BY created_at DESC, id DESC
) AS items
