function @set -a name value
  if set -q $name
    set -gx @had_$name s
    set -qx $name; and set -gx @had_$name x
    set -gx @old_$name "$$name"
  end
  set -gx @new_$name $value
  set -gx $name $value
end
function @unset -a name
  set -l new @new_$name
  set -l old @old_$name
  set -l had @had_$name
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
function @prompt
  functions -q @fish_prompt; and return
  functions -c fish_prompt @fish_prompt; or return
  function fish_prompt
    set -l @text (@fish_prompt)
    printf %s "$@prefix" (string join \n -- $@text | string collect -N)
  end
end
function @hook --on-event fish_prompt --on-variable PWD
  if not set -q LLMSTACK_ACTIVE
    if test "$@pwd" != "$PWD"
      set -g @pwd $PWD
      set -g @dirs
      set -l dir "$PWD/."
      while test "$dir" != /.
        set -a @dirs $dir
        set dir (string replace -r '/[^/]*/\.\z' /. -- $dir | string collect)
      end
      set -a @dirs /.
    end
    set -l at
    set -l key
    for dir in $@dirs
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
      if test -r @TRUST@
        begin
          read two
          read two
        end <@TRUST@
      end
      set key $at//$one//$two//
      for f in opencode.json AGENTS.md
        if test -e $p/$f
          set key $key. (path mtime -- $p/$f 2>/dev/null)
        end
      end
      set key "$key"
    end
    if not set -q @key; or test "$key" != "$@key"
      set -g @key $key
@UNSET@
      set -g @prefix
      set -gx LLMSTACK_HOOK "$SHLVL:fish:"
      if test -n "$at" -a -x @PYTHON@ -a -f @PROGRAM@
        @PYTHON@ -I @PROGRAM@ _hook fish $at </dev/null | source
        @prompt
      end
    end
  end
  return 0
end
if status is-interactive
  string match -q -- "$SHLVL:fish:*" "$LLMSTACK_HOOK"; or set -gx LLMSTACK_HOOK "$SHLVL:fish:"
end
