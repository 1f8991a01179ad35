-- {task} in the other files: a task as JSON, as clients see it. Timestamps are in UTC and keep all six digits, so
-- that they sort as text; PostgreSQL's own JSON output would follow the session's time zone and drop trailing zeros.
-- Infinite ones, as only old rows can have, are empty. The version comes last, where service.py looks for the ETag.
-- json_build_object would take longer, and so would to_json of what is the same as text: an id, true or false.
'{"id": ' || id
|| ', "user_id": ' || to_json(user_id)
|| ', "title": ' || to_json(title)
|| ', "description": ' || coalesce(to_json(description), 'null')
|| ', "completed": ' || completed
|| ', "created_at": "' || coalesce(to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"'), '')
|| '", "updated_at": "' || {version} || '"}'
