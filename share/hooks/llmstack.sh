@set() {
  eval "if [[ -n \${$1+x} ]]; then export @had_$1=$3 @old_$1=\"\$$1\"; fi
    export @new_$1=\"\$2\" $1=\"\$2\""
}
@unset() {
  eval "if [[ -n \${@new_$1+x} ]]; then
    if [[ \${$1-} == \"\$@new_$1\" ]]; then
      unset $1
      if [[ -n \${@had_$1-} ]]; then $1=\$@old_$1; fi
      if [[ \${@had_$1-} == x ]]; then export $1; fi
    fi
    unset @new_$1 @old_$1 @had_$1
  fi"
}
@prompt() {
  if [[ -n ${@shown-} && $@shown != "${@prefix-}" ]]; then PS1=${PS1/"$@shown"/}; fi
  if [[ -n ${@prefix-} ]]; then
    @shown=$@prefix
    if [[ ${PS1-} != *"$@prefix"* ]]; then PS1=$@prefix${PS1-}; fi
  fi
}
@hook() {
  local st=$? dir=${PWD-} at= key= one= two= f=@LOCAL@
  if [[ -z ${LLMSTACK_ACTIVE-} ]]; then
    while :; do
      if [[ -f $dir/.llmstack/default-channel || -f $dir/.llmstack/opencode.json ]]; then at=$dir/.llmstack; break; fi
      if [[ $dir != */* ]]; then break; fi
      dir=${dir%/*}
    done
    if [[ -n $at ]]; then
      if [[ -r $at/default-channel && -f $at/default-channel && ! -L $at/default-channel ]]; then
        builtin read -r @CHARS@ one < "$at/default-channel" || :
      fi
      if [[ -r @TRUST@ ]]; then { builtin read -r two; builtin read -r two; } < @TRUST@ || :; fi
      key=$dir//$one//$two//
      for f in default-channel opencode.json AGENTS.md; do
        if [[ $at/$f -nt @TRUST@ ]]; then key=$key+; elif [[ -e $at/$f ]]; then key=$key.; else key=$key-; fi
      done
    fi
    if [[ $key != "${@key-?}" ]]; then
      @key=$key
@UNSET@
      @prefix=
      export LLMSTACK_HOOK="${SHLVL-}:@SHELL@:"
      if [[ -n $at && -x @PYTHON@ && -f @PROGRAM@ ]]; then
        one=$(@PYTHON@ -I @PROGRAM@ _hook @SHELL@ "$dir/" < /dev/null) || :
        eval "$one"
      fi
    fi
  fi
  @prompt
  if [[ $- != *e* ]]; then return $st; fi
}
