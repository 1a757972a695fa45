# shellcheck shell=bash
# shellcheck disable=SC2128,SC2178  # PROMPT_COMMAND is an array or, before bash 5.1, a string
# The part of the hook that is bash's own; llmstack.sh stands before it.

_llmstack_shell=bash

_llmstack_read_marker() {
  # shellcheck disable=SC2034  # _llmstack_look's own variable
  builtin read -r -n 600 one
}

_llmstack_hook() {
  local st=$?
  _llmstack_look
  _llmstack_prompt
  if [[ $- != *e* ]]; then return $st; fi
}

if [[ $- == *i* ]]; then
  if [[ ${LLMSTACK_HOOK-} != "${SHLVL-}:bash:"* ]]; then export LLMSTACK_HOOK="${SHLVL-}:bash:"; fi
  case "${PROMPT_COMMAND[*]-}" in
    *_llmstack_hook*) ;;
    *)
      case "$(declare -p PROMPT_COMMAND 2>/dev/null)" in
        'declare -a'*) PROMPT_COMMAND+=(_llmstack_hook) ;;
        *) PROMPT_COMMAND="${PROMPT_COMMAND:+$PROMPT_COMMAND
}_llmstack_hook" ;;
      esac
      ;;
  esac
fi
