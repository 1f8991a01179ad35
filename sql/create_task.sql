-- The new task and its id. $2: title, $3: description or null, $4: completed.
INSERT INTO task (user_id, title, description, completed)
VALUES ($1, $2, $3, $4)
RETURNING {task}, id
