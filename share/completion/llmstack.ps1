Register-ArgumentCompleter -Native -CommandName llmstack -ScriptBlock {
  param($Typed, $Line, $Cursor)
  $words = @($Line.CommandElements | Select-Object -Skip 1 | ForEach-Object { "$_" })
  if ("$Typed" -ne '') { $words = @($words | Select-Object -SkipLast 1) }
  llmstack completion --complete @words "=$Typed" 2>$null | ForEach-Object {
    [System.Management.Automation.CompletionResult]::new($_)
  }
}
