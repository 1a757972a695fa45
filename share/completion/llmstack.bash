# shellcheck shell=bash
_llmstack_complete() {
  local line
  COMPREPLY=()
  while IFS= read -r line; do
    COMPREPLY+=("$line")
  done < <(llmstack completion --complete "${COMP_WORDS[@]:1:COMP_CWORD-1}" \
    "=${COMP_WORDS[COMP_CWORD]}" 2> /dev/null)
}
complete -o default -F _llmstack_complete llmstack
