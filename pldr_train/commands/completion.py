"""`pldr-train completion`: commands, options and recipe keys for the shell's Tab key."""

from __future__ import annotations

import argparse

from pldr_train.commands import COMMANDS
from pldr_train.commands.options import TwoWordParser
from pldr_train.recipe import recipe_keys
from pldr_train.recipe.explaining import section_names

_SCRIPT = """# Completion of pldr-train for bash and zsh. In ~/.bashrc or ~/.zshrc:  eval "$(pldr-train completion)"
if [ -n "${{ZSH_VERSION-}}" ]; then autoload -Uz bashcompinit && bashcompinit; fi
_pldr_train() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" words="" keys="" command="${{COMP_WORDS[1]-}}"
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$current"))
        return
    fi
    case "$command" in
{cases}
    esac
    if [ "${{current#-}}" != "$current" ]; then
        COMPREPLY=($(compgen -W "$words" -- "$current"))
        return
    fi
    COMPREPLY=($(compgen -W "$keys" -- "$current") $(compgen -f -- "$current"))
    if [ "${{#COMPREPLY[@]}}" -eq 1 ] && [ "${{COMPREPLY[0]%=}}" != "${{COMPREPLY[0]}}" ]; then
        compopt -o nospace 2>/dev/null
    fi
}}
complete -o filenames -F _pldr_train pldr-train
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    return argparse.ArgumentParser(
        prog="pldr-train completion",
        description="Print a script that completes commands, options and recipe keys in bash and zsh. Put this line "
        'into ~/.bashrc or ~/.zshrc: eval "$(pldr-train completion)"',
    )


def run(_: argparse.Namespace) -> int:
    """Print the script."""
    assigned = " ".join(f"{key}=" for key in recipe_keys())
    cases = []
    for name, command in COMMANDS.items():
        parser = command.load().build_parser()
        options = sorted(_options(parser))
        keys = assigned if any(action.dest == "overrides" for action in parser._actions) else ""
        if name == "explain":
            keys = " ".join([*section_names(), *recipe_keys()])
        if isinstance(parser, TwoWordParser):
            keys = " ".join([*parser.actions, assigned])
            options = sorted({word for action in parser.actions.values() for word in _options(action.build_parser())})
        cases.append(f'    {name}) words="{" ".join(options)}"; keys="{keys}";;')
    print(_SCRIPT.format(commands=" ".join(COMMANDS), cases="\n".join(cases)), end="")
    return 0


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [word for action in parser._actions for word in action.option_strings if word.startswith("--")]
