"""The option --citus: which tests run on a distributed table, and how it is made."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import psycopg.sql
import pytest

from sql.database import SCHEMA
from tests.support.service_process import ROOT

API = (
    "tasks", "timestamps", "paths", "errors", "bodies", "etags", "if_match", "idempotency", "races",
    "repeating_clients", "concurrency", "isolation",
)  # fmt: skip
FILES = {ROOT / "tests" / "database" / "test_citus.py", *(ROOT / "tests" / "api" / f"test_{name}.py" for name in API)}
NOT_ON_CITUS = {
    # They wait for statements that wait for a lock, which are to be seen on the worker alone.
    "test_two_toggles_at_once_are_both_done",
    "test_fifty_creations_with_one_key_make_one_task",
    "test_creations_with_one_key_and_two_bodies_make_one_task",
    "test_two_users_who_race_with_one_key_have_a_task_each",
    "test_creations_with_one_key_that_meet_a_deletion_are_all_made",
    "test_of_different_writes_with_one_etag_one_is_made",
    "test_of_fifty_writes_with_one_etag_one_is_made",
    # They change the settings of the whole database.
    "test_timestamps_do_not_depend_on_the_settings_of_the_database",
    # A distributed table has no triggers, its constraints have other names, and its ids come from each node.
    "test_a_creation_that_the_database_refuses_uses_no_key_up",
    "test_a_bug_is_logged_with_its_traceback_and_answered_without",
    "test_a_bug_changes_nothing_and_harms_no_other_request",
    "test_a_bug_is_answered_on_reads_too",
    "test_an_id_that_is_taken_already_is_a_bug",
    "test_what_a_rule_of_the_database_refuses_is_no_bug",
    "test_an_exception_in_the_middle_of_an_answer_is_logged_with_the_status_that_was_sent",
    # Citus itself refuses what they make to see it found: such an index, and a statement of several shards.
    "test_every_unique_index_has_the_column_user_id",
    "test_a_row_that_a_mutant_finds_of_somebody_else_ends_a_list_that_has_begun",
    # They make what they need in an empty database, or start copies of the program on very many.
    "test_the_option_runs_the_tests_of_the_api_on_distributed_tables",
    "test_the_primary_key_of_the_old_backend_has_no_column_user_id",
    "test_a_row_that_a_mutant_finds_of_somebody_else_is_an_error_and_no_answer",
    "test_each_mutant_is_caught_by_the_check_of_its_statement",
}


def runs_on_citus(item: pytest.Item) -> bool:
    """Return whether a test can run on a distributed table."""
    return item.path in FILES and item.name.partition("[")[0] not in NOT_ON_CITUS


@contextmanager
def distributed_schemas(url: str) -> Iterator[Callable[[], str]]:
    """A function that creates a schema with the distributed table, and returns the URL by which it is found."""
    schemas = []

    def create() -> str:
        schema = f"tasks_{uuid.uuid4().hex[:12]}"
        schemas.append(schema)
        in_schema = f"{url}{'&' if '?' in url else '?'}options=-csearch_path%3D{schema}%2Cpublic"
        with psycopg.connect(in_schema, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {schema}".encode())
            connection.execute(SCHEMA.encode())
            connection.execute("SELECT create_distributed_table('task', 'user_id')")
        return in_schema

    yield create
    with psycopg.connect(url, autocommit=True) as connection:
        for schema in schemas:
            connection.execute(f"DROP SCHEMA {schema} CASCADE".encode())
