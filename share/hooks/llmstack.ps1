function global:@get($Name) { [Environment]::GetEnvironmentVariable($Name) }
function global:@put($Name, $Value) {
  if ($null -eq $Value) { Remove-Item "env:$Name" -ErrorAction Ignore } else { Set-Item "env:$Name" $Value }
}
function global:@set($Name, $Value) {
  @put "@old_$Name" (@get $Name)
  @put "@new_$Name" $Value
  @put $Name $Value
}
function global:@unset($Name) {
  $new = @get "@new_$Name"
  if ($null -eq $new) { return }
  if ((@get $Name) -ceq $new) { @put $Name (@get "@old_$Name") }
  @put "@new_$Name" $null
  @put "@old_$Name" $null
}
function global:@hook {
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
    $key += '/' + [IO.File]::GetLastWriteTimeUtc(@TRUST@).Ticks
  }
  if ($key -ceq $global:@key) { return }
  $global:@key = $key
@UNSET@
  $global:@prefix = ''
  $env:LLMSTACK_HOOK = "$($env:SHLVL):powershell:"
  if ($dir -and [IO.File]::Exists(@PYTHON@) -and [IO.File]::Exists(@PROGRAM@)) {
    $code = $global:LASTEXITCODE
    $text = ($null | & @PYTHON@ -I @PROGRAM@ _hook powershell $dir) -join "`n"
    $global:LASTEXITCODE = $code
    if ($text) { Invoke-Expression $text }
  }
}
if (-not (Test-Path variable:global:@prompt)) {
  $global:@key = '?'
  $global:@prefix = ''
  $global:@prompt = $function:prompt
  $env:LLMSTACK_HOOK = "$($env:SHLVL):powershell:"
  function global:prompt {
    $ok = $?
    try { @hook } catch { }
    if ($ok) { $null = 1 } else { Write-Error '' -ErrorAction Ignore }
    $text = & $global:@prompt
    "$($global:@prefix)$text"
  }
}
