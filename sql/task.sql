-- {task} in the other files: a task as JSON, as clients see it. Timestamps are in UTC and keep all six digits, so
-- that they sort as text; PostgreSQL's own JSON output would follow the session's time zone and drop trailing zeros.
-- The version comes last, where service.py looks for the ETag. format() takes two thirds of json_build_object's time.
format(
    '{"id": %s, "user_id": %s, "title": %s, "description": %s, "completed": %s, "created_at": "%s", "updated_at": "%s"}',
    id,
    to_json(user_id),
    to_json(title),
    coalesce(to_json(description), 'null'),
    to_json(completed),
    to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"'),
    {version}
)
