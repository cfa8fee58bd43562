"""The benchmark's command line, called in this process."""

from typer.testing import CliRunner

from bench.cli import app


def run(*arguments, code=0):
    """What a command prints; any other exit status than ``code`` raises with that."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output
