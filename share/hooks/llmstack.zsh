# The part of the hook that is zsh's own; llmstack.sh stands before it.

_llmstack_shell=zsh

_llmstack_read_marker() {
  builtin read -r -k 600 -u 0 one
}

_llmstack_hook() {
  local st=$?
  emulate -L zsh
  _llmstack_look
  _llmstack_prompt
  if [[ $- != *e* ]]; then return $st; fi
}

() {
  emulate -L zsh
  [[ -o interactive ]] || return 0
  [[ ${LLMSTACK_HOOK-} == "${SHLVL-}:zsh:"* ]] || export LLMSTACK_HOOK="${SHLVL-}:zsh:"
  typeset -ga precmd_functions chpwd_functions
  (( $precmd_functions[(I)_llmstack_hook] )) || precmd_functions+=(_llmstack_hook)
  (( $chpwd_functions[(I)_llmstack_hook] )) || chpwd_functions+=(_llmstack_hook)
}
