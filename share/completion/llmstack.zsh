#compdef llmstack
_llmstack() {
  local -a found
  found=(${(f)"$(llmstack completion --complete "${(@)words[2,CURRENT-1]}" \
    "=${words[CURRENT]}" 2> /dev/null)"})
  if (( $#found )); then
    compadd -a found
  else
    _files
  fi
}
compdef _llmstack llmstack
