if [[ $- == *i* ]]; then
  if [[ ${LLMSTACK_HOOK-} != "${SHLVL-}:bash:"* ]]; then export LLMSTACK_HOOK="${SHLVL-}:bash:"; fi
  case "${PROMPT_COMMAND[*]-}" in
    *@hook*) ;;
    *) case "$(declare -p PROMPT_COMMAND 2>/dev/null)" in
        'declare -a'*) PROMPT_COMMAND+=(@hook) ;;
        *) PROMPT_COMMAND="${PROMPT_COMMAND:+$PROMPT_COMMAND
}@hook" ;;
      esac ;;
  esac
fi
