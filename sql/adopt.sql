-- Converts the table of another program into that of schema.sql, but for the indexes. There are two such programs:
--   the FastAPI + SQLModel backend: integer ids, timestamps without a zone that hold UTC, no keys;
--   version 1.0: idempotency_key has the key, a space and the hash; the limits of times are a microsecond wider.
-- Applied only where `task` has no column request_hash, in the transaction of schema.sql and before it. The primary key
-- stays as it is, since other tables may refer to it.

LOCK TABLE task IN ACCESS EXCLUSIVE MODE;
SET LOCAL TimeZone = 'UTC';

ALTER TABLE task ADD COLUMN IF NOT EXISTS idempotency_key text;
ALTER TABLE task ADD COLUMN IF NOT EXISTS request_hash text;
UPDATE task
SET idempotency_key = split_part(idempotency_key, ' ', 1),
    request_hash = split_part(idempotency_key, ' ', 2)
WHERE idempotency_key LIKE '% %';

-- A row that nobody owns gets an owner that no token can name. A time beyond the limits, or on their last day, moves
-- inside, with room for changes to move it on.
ALTER TABLE task DROP CONSTRAINT IF EXISTS task_created_at;
ALTER TABLE task DROP CONSTRAINT IF EXISTS task_updated_at;
UPDATE task
SET user_id = coalesce(user_id, ''),
    title = coalesce(title, ''),
    completed = coalesce(completed, false),
    created_at = greatest(least(coalesce(created_at, updated_at, now()), last), first),
    updated_at = greatest(least(coalesce(updated_at, created_at, now()), last), first)
FROM (VALUES (timestamptz '0001-01-01 00:00:00.000001Z', timestamptz '9999-12-31 00:00Z')) AS bounds (first, last)
WHERE num_nulls(user_id, title, completed, created_at, updated_at) > 0
   OR created_at NOT BETWEEN first AND last
   OR updated_at NOT BETWEEN first AND last;

DO $$
DECLARE
    column_name text;
    rule text;
    last_id bigint;
BEGIN
    IF EXISTS (
        SELECT FROM pg_attribute
        JOIN (VALUES ('id', 'bigint'), ('user_id', 'text'), ('title', 'text'), ('description', 'text'),
            ('completed', 'boolean'), ('created_at', 'timestamp with time zone'),
            ('updated_at', 'timestamp with time zone')) AS ours (name, type) ON attname = name
        WHERE attrelid = to_regclass('task')
          AND (format_type(atttypid, atttypmod) <> type
            OR attnotnull = (name = 'description')
            OR NOT atthasdef AND name IN ('completed', 'created_at', 'updated_at'))
    ) THEN
        ALTER TABLE task
            ALTER COLUMN id          TYPE bigint,
            ALTER COLUMN user_id     TYPE text,
            ALTER COLUMN user_id     SET NOT NULL,
            ALTER COLUMN title       TYPE text,
            ALTER COLUMN title       SET NOT NULL,
            ALTER COLUMN description TYPE text,
            ALTER COLUMN description DROP NOT NULL,
            ALTER COLUMN completed   SET NOT NULL,
            ALTER COLUMN completed   SET DEFAULT false,
            ALTER COLUMN created_at  DROP DEFAULT,
            ALTER COLUMN created_at  TYPE timestamptz,
            ALTER COLUMN created_at  SET NOT NULL,
            ALTER COLUMN created_at  SET DEFAULT now(),
            ALTER COLUMN updated_at  DROP DEFAULT,
            ALTER COLUMN updated_at  TYPE timestamptz,
            ALTER COLUMN updated_at  SET NOT NULL,
            ALTER COLUMN updated_at  SET DEFAULT now();
        IF pg_get_serial_sequence('task', 'id') IS NOT NULL THEN
            EXECUTE format('ALTER SEQUENCE %s AS bigint', pg_get_serial_sequence('task', 'id'));
        END IF;
    END IF;

    -- The constraints of schema.sql. Old rows that break a rule are let be, and can still be changed and deleted: the
    -- rule then holds for later ids than theirs.
    FOR column_name, rule IN VALUES
        ('user_id', 'char_length(user_id) BETWEEN 1 AND 255'),
        ('id', 'id > 0'),
        ('title', $rule$
            char_length(title) <= 200
            AND btrim(title, E'\t\n\x0B\f\r\x1C\x1D\x1E\x1F \u0085\u00A0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006'
                '\u2007\u2008\u2009\u200A\u2028\u2029\u202F\u205F\u3000') <> ''
        $rule$),
        ('description', 'char_length(description) <= 2000'),
        ('created_at', $rule$created_at > '0001-01-01 00:00Z' AND created_at < '9999-12-31 23:59:59.999999Z'$rule$),
        ('updated_at', $rule$updated_at > '0001-01-01 00:00Z' AND updated_at < '9999-12-31 23:59:59.999999Z'$rule$)
    LOOP
        IF NOT EXISTS (
            SELECT FROM pg_constraint
            WHERE conrelid = to_regclass('task') AND conname = 'task_' || column_name
        ) THEN
            EXECUTE format('SELECT max(id) FROM task WHERE NOT (%s)', rule) INTO last_id;
            rule := CASE WHEN last_id IS NULL THEN '' ELSE format('id <= %s OR ', last_id) END || '(' || rule || ')';
            EXECUTE format('ALTER TABLE task ADD CONSTRAINT %I CHECK (%s)', 'task_' || column_name, rule);
        END IF;
    END LOOP;

    -- Processes of version 1.0 may still run. They need their unique index, which stays, and write "key hash" into one
    -- column, which this trigger splits: so a key makes one task whichever version it is sent to.
    IF to_regclass('task_user_id_idempotency_key_idx') IS NOT NULL THEN
        CREATE OR REPLACE FUNCTION task_split_key() RETURNS trigger LANGUAGE plpgsql AS $function$
        BEGIN
            NEW.request_hash := split_part(NEW.idempotency_key, ' ', 2);
            NEW.idempotency_key := split_part(NEW.idempotency_key, ' ', 1);
            -- To version 1.0, no row means that the key came with another request before.
            IF TG_OP = 'INSERT' AND EXISTS (
                SELECT FROM task
                WHERE user_id = NEW.user_id
                  AND idempotency_key = NEW.idempotency_key
                  AND request_hash <> NEW.request_hash
            ) THEN
                RETURN NULL;
            END IF;
            RETURN NEW;
        END
        $function$;
        DROP TRIGGER IF EXISTS task_split_key ON task;
        CREATE TRIGGER task_split_key BEFORE INSERT OR UPDATE OF idempotency_key ON task
            FOR EACH ROW WHEN (NEW.idempotency_key LIKE '% %') EXECUTE FUNCTION task_split_key();
        DROP INDEX IF EXISTS task_pending_idx;  -- which version 1.0 can do without
    END IF;
END
$$;
