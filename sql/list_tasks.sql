-- The caller's tasks, newest first, with commas between them, or null if there are none. Queries.list_tasks makes a JSON
-- object of them; here that would copy a long list again. As bytes, because text would be decoded, only to be encoded
-- again for the client. {status} is a condition, one of the values of STATUSES in __init__.py.
SELECT convert_to(string_agg(item, ', '), 'UTF8')
FROM (
    SELECT {task} AS item
    FROM task
    WHERE user_id = $1
      AND {status}
    ORDER BY created_at DESC, id DESC
) AS items
