# The hook of PowerShell: see llmstack.sh for what it does. llmstack puts lines in front of it that set
# $global:_llmstack_python, _llmstack_program and _llmstack_trust.

function global:_llmstack_get($Name) { [Environment]::GetEnvironmentVariable($Name) }

function global:_llmstack_put($Name, $Value) {
  if ($null -eq $Value) { Remove-Item "env:$Name" -ErrorAction Ignore } else { Set-Item "env:$Name" $Value }
}

function global:_llmstack_set($Name, $Value) {
  _llmstack_put "_llmstack_old_$Name" (_llmstack_get $Name)
  _llmstack_put "_llmstack_new_$Name" $Value
  _llmstack_put $Name $Value
}

function global:_llmstack_unset($Name) {
  $new = _llmstack_get "_llmstack_new_$Name"
  if ($null -eq $new) { return }
  if ((_llmstack_get $Name) -ceq $new) { _llmstack_put $Name (_llmstack_get "_llmstack_old_$Name") }
  _llmstack_put "_llmstack_new_$Name" $null
  _llmstack_put "_llmstack_old_$Name" $null
}

function global:_llmstack_hook {
  if ($env:LLMSTACK_ACTIVE) { return }
  $dir = (Get-Location -PSProvider FileSystem).ProviderPath
  $at = ''
  $key = ''
  while ($dir) {
    $at = [IO.Path]::Combine($dir, '.llmstack')
    if ([IO.File]::Exists("$at/default-channel") -or [IO.File]::Exists("$at/opencode.json")) { break }
    $dir = [IO.Path]::GetDirectoryName($dir)
  }
  if ($dir) {
    $key = $dir
    foreach ($f in 'default-channel', 'opencode.json', 'AGENTS.md') {
      $key += '/' + [IO.File]::GetLastWriteTimeUtc("$at/$f").Ticks
    }
    $key += '/' + [IO.File]::GetLastWriteTimeUtc($global:_llmstack_trust).Ticks
  }
  if ($key -ceq $global:_llmstack_key) { return }
  $global:_llmstack_key = $key
  _llmstack_unset OPENCODE_CONFIG
  _llmstack_unset LLMSTACK_WORK_DIR
  _llmstack_unset LLMSTACK_CHANNEL
  _llmstack_unset LLMSTACK_ROOT
  _llmstack_unset LLMSTACK_REMOTE_URL
  $global:_llmstack_prefix = ''
  $env:LLMSTACK_HOOK = "$($env:SHLVL):powershell:"
  if ($dir -and [IO.File]::Exists($global:_llmstack_python) -and [IO.File]::Exists($global:_llmstack_program)) {
    $code = $global:LASTEXITCODE
    $text = ($null | & $global:_llmstack_python -I $global:_llmstack_program _hook powershell $dir) -join "`n"
    $global:LASTEXITCODE = $code
    if ($text) { Invoke-Expression $text }
  }
}

if (-not (Test-Path variable:global:_llmstack_prompt)) {
  $global:_llmstack_key = '?'
  $global:_llmstack_prefix = ''
  $global:_llmstack_prompt = $function:prompt
  $env:LLMSTACK_HOOK = "$($env:SHLVL):powershell:"
  function global:prompt {
    $ok = $?
    try { _llmstack_hook } catch { }
    if ($ok) { $null = 1 } else { Write-Error '' -ErrorAction Ignore }
    $text = & $global:_llmstack_prompt
    "$($global:_llmstack_prefix)$text"
  }
}

if (-not (Get-Command llmstack -ErrorAction Ignore)) {
  function global:llmstack { & $global:_llmstack_python $global:_llmstack_program @args }
}
