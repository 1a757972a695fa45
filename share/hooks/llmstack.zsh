() {
  emulate -L zsh
  [[ -o interactive ]] || return 0
  [[ ${LLMSTACK_HOOK-} == "${SHLVL-}:zsh:"* ]] || export LLMSTACK_HOOK="${SHLVL-}:zsh:"
  typeset -ga precmd_functions chpwd_functions
  (( $precmd_functions[(I)@hook] )) || precmd_functions+=(@hook)
  (( $chpwd_functions[(I)@hook] )) || chpwd_functions+=(@hook)
}
