# The hook of fish: see llmstack.sh for what it does. llmstack puts lines in front of it that set
# _llmstack_python, _llmstack_program and _llmstack_trust.

function _llmstack_set -a name value
  if set -q $name
    set -gx _llmstack_had_$name s
    set -qx $name; and set -gx _llmstack_had_$name x
    set -gx _llmstack_old_$name "$$name"
  end
  set -gx _llmstack_new_$name $value
  set -gx $name $value
end

function _llmstack_unset -a name
  set -l new _llmstack_new_$name
  set -l old _llmstack_old_$name
  set -l had _llmstack_had_$name
  set -q $new; or return 0
  if test "$$name" = "$$new"
    set -eg $name
    if set -q $had; and not set -q $name
      test "$$had" = x; and set -gx $name "$$old"; or set -g $name "$$old"
    end
  end
  set -eg $new
  set -eg $old
  set -eg $had
  return 0
end

function _llmstack_prompt
  functions -q _llmstack_fish_prompt; and return
  functions -c fish_prompt _llmstack_fish_prompt; or return
  function fish_prompt
    set -l _llmstack_text (_llmstack_fish_prompt)
    printf %s "$_llmstack_prefix" (string join \n -- $_llmstack_text | string collect -N)
  end
end

function _llmstack_hook --on-event fish_prompt --on-variable PWD
  if not set -q LLMSTACK_ACTIVE
    if test "$_llmstack_pwd" != "$PWD"
      set -g _llmstack_pwd $PWD
      set -g _llmstack_dirs
      set -l dir "$PWD/."
      while test "$dir" != /.
        set -a _llmstack_dirs $dir
        set dir (string replace -r '/[^/]*/\.\z' /. -- $dir | string collect)
      end
      set -a _llmstack_dirs /.
    end
    set -l at
    set -l key
    for dir in $_llmstack_dirs
      if test -f $dir/.llmstack/default-channel -o -f $dir/.llmstack/opencode.json
        set at $dir
        break
      end
    end
    if test -n "$at"
      set -l p $at/.llmstack
      set -l one
      set -l two
      if test -r $p/default-channel -a -f $p/default-channel -a ! -L $p/default-channel
        read -n 600 one <$p/default-channel
      end
      if test -r "$_llmstack_trust"
        begin
          read two
          read two
        end <"$_llmstack_trust"
      end
      set key $at//$one//$two//
      for f in opencode.json AGENTS.md
        if test -e $p/$f
          set key $key. (path mtime -- $p/$f 2>/dev/null)
        end
      end
      set key "$key"
    end
    if not set -q _llmstack_key; or test "$key" != "$_llmstack_key"
      set -g _llmstack_key $key
      _llmstack_unset OPENCODE_CONFIG
      _llmstack_unset LLMSTACK_WORK_DIR
      _llmstack_unset LLMSTACK_CHANNEL
      _llmstack_unset LLMSTACK_ROOT
      _llmstack_unset LLMSTACK_REMOTE_URL
      set -g _llmstack_prefix
      set -gx LLMSTACK_HOOK "$SHLVL:fish:"
      if test -n "$at" -a -x "$_llmstack_python" -a -f "$_llmstack_program"
        "$_llmstack_python" -I "$_llmstack_program" _hook fish $at </dev/null | source
        _llmstack_prompt
      end
    end
  end
  return 0
end

if status is-interactive
  string match -q -- "$SHLVL:fish:*" "$LLMSTACK_HOOK"; or set -gx LLMSTACK_HOOK "$SHLVL:fish:"
end

if not type -q llmstack
  function llmstack
    "$_llmstack_python" "$_llmstack_program" $argv
  end
end
