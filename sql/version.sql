-- {version} in the other files: which state of a task it is, for If-Match. Its updated_at, as clients see it.
to_char(updated_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')
