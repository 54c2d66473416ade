"""Commands run in this process."""

import pytest
from typer.testing import CliRunner

from headscope.cli.app import app
from headscope.errors import HeadscopeError


def run(*arguments: object, code: int = 0) -> str:
    """What a command printed on stdout."""
    result = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def sentence(*arguments: object) -> str:
    """The one sentence that a wrong call gives."""
    with pytest.raises(HeadscopeError) as error:
        CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    text = str(error.value)
    assert "\n" not in text
    return text
