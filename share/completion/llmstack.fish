function __llmstack_complete
  set -l before (commandline -opc)
  set -l typed (commandline -ct)
  set -e before[1]
  llmstack completion --complete $before "=$typed" 2>/dev/null
end
complete -c llmstack -a '(__llmstack_complete)'
complete -c llmstack -n 'test (count (commandline -opc)) -eq 1' -f
