# shellcheck shell=bash
# shellcheck disable=SC2154  # llmstack puts _llmstack_python, _program and _trust in front; evals set others
# What the hooks of bash and zsh share; llmstack.bash or llmstack.zsh follows it.
#
# At a prompt a hook looks upward for a project and makes a key of what it sees there, with builtins only.
# When the key is another one than last time, it undoes what the last project has set and asks
# `llmstack _hook`, which checks everything and answers with lines of _llmstack_set NAME 'VALUE'. Nothing
# else is ever evaluated. What a variable was before is kept in exported variables, so that a shell started
# inside a project can leave it, too.
#
# The key has the marker's text; of the other files whether they are newer than the record of trust (a shell
# without stat sees a change so); of that record its second line, which is another one whenever somebody
# trusts something.

_llmstack_set() {
  eval "if [[ -n \${$1+x} ]]; then export _llmstack_had_$1=$3 _llmstack_old_$1=\"\$$1\"; fi
    export _llmstack_new_$1=\"\$2\" $1=\"\$2\""
}

_llmstack_unset() {
  eval "if [[ -n \${_llmstack_new_$1+x} ]]; then
    if [[ \${$1-} == \"\$_llmstack_new_$1\" ]]; then
      unset $1
      if [[ -n \${_llmstack_had_$1-} ]]; then $1=\$_llmstack_old_$1; fi
      if [[ \${_llmstack_had_$1-} == x ]]; then export $1; fi
    fi
    unset _llmstack_new_$1 _llmstack_old_$1 _llmstack_had_$1
  fi"
}

_llmstack_prompt() {
  if [[ -n ${_llmstack_shown-} && $_llmstack_shown != "${_llmstack_prefix-}" ]]; then
    PS1=${PS1/"$_llmstack_shown"/}
  fi
  if [[ -n ${_llmstack_prefix-} ]]; then
    _llmstack_shown=$_llmstack_prefix
    if [[ ${PS1-} != *"$_llmstack_prefix"* ]]; then PS1=$_llmstack_prefix${PS1-}; fi
  fi
}

_llmstack_look() {
  local dir=${PWD-} at='' key='' one='' two='' f
  if [[ -n ${LLMSTACK_ACTIVE-} ]]; then return 0; fi
  while :; do
    if [[ -f $dir/.llmstack/default-channel || -f $dir/.llmstack/opencode.json ]]; then
      at=$dir/.llmstack
      break
    fi
    if [[ $dir != */* ]]; then break; fi
    dir=${dir%/*}
  done
  if [[ -n $at ]]; then
    if [[ -r $at/default-channel && -f $at/default-channel && ! -L $at/default-channel ]]; then
      _llmstack_read_marker < "$at/default-channel" || :
    fi
    if [[ -r $_llmstack_trust ]]; then
      { builtin read -r two; builtin read -r two; } < "$_llmstack_trust" || :
    fi
    key=$dir//$one//$two//
    for f in default-channel opencode.json AGENTS.md; do
      if [[ $at/$f -nt $_llmstack_trust ]]; then
        key=$key+
      elif [[ -e $at/$f ]]; then
        key=$key.
      else
        key=$key-
      fi
    done
  fi
  if [[ $key == "${_llmstack_key-?}" ]]; then return 0; fi
  _llmstack_key=$key
  _llmstack_unset OPENCODE_CONFIG
  _llmstack_unset LLMSTACK_WORK_DIR
  _llmstack_unset LLMSTACK_CHANNEL
  _llmstack_unset LLMSTACK_ROOT
  _llmstack_unset LLMSTACK_REMOTE_URL
  _llmstack_prefix=
  export LLMSTACK_HOOK="${SHLVL-}:$_llmstack_shell:"
  if [[ -n $at && -x $_llmstack_python && -f $_llmstack_program ]]; then
    one=$("$_llmstack_python" -I "$_llmstack_program" _hook "$_llmstack_shell" "$dir/" < /dev/null) || :
    eval "$one"
  fi
}

if ! command -v llmstack > /dev/null 2>&1; then
  llmstack() { "$_llmstack_python" "$_llmstack_program" "$@"; }
fi
