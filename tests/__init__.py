import pytest

pytest.register_assert_rewrite("tests.support")  # or a failed assert there would not tell what it compared
