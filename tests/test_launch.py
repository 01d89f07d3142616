"""The launch files, with commands in place of gcloud, sbatch and others that record how they were called.

The fake gcloud runs what it is told to run on a worker here, in a folder that stands for that worker's home.
"""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny_runs import ROOT

SCRIPTS = sorted(ROOT.glob('launch/*.sh'))
TRAIN = ['--config=experiments/digits.py:tokenizer', '--workdir=/mnt/runs/w']
POD = ['--name=pod', '--zone=z', '--type=v5litepod-16', '--poll=2']
JOB = ['--nodes=4', '--gpus=8']
STRANGE = "--config.freeze=it's,*/$HOME"  # has to arrive as it is

GCLOUD = r'''#!/bin/bash
printf '%s\0' "$@" $'\n' >> "$FAKE/gcloud"
next() {  # the next line of a file, the last one for ever
  mapfile -t lines < "$FAKE/$1"
  if [ ${#lines[@]} -gt 1 ]; then printf '%s\n' "${lines[@]:1}" > "$FAKE/$1"; fi
  case $lines in
    MISSING) echo 'ERROR: NOT_FOUND: there is no such resource' >&2; exit 1 ;;
    OFFLINE) echo 'ERROR: the network is unreachable' >&2; exit 1 ;;
    *) echo "$lines" ;;
  esac
}
command= workers='0 1' status=0
for argument; do
  case $argument in
    --command=*) command=${argument#*=} ;;
    --worker=0) workers=0 ;;
  esac
done
case "$3 $4" in
  'tpu-vm describe') next states ;;
  'queued-resources describe') next queue ;;
  'tpu-vm scp') for i in $workers; do cp "$5" "$FAKE/$i/${6#*:}" || exit; done ;;
  'tpu-vm delete'|'queued-resources delete') rm -rf "$FAKE"/[01]/* ;;
  'tpu-vm ssh') for i in $workers; do (cd "$FAKE/$i"; HOME=$PWD bash -c "$command") || status=$?; done ;;
esac
exit $status
'''
# python3 of a worker: all that it is asked for is a virtual environment, whose python trains.
PYTHON3 = '''#!/bin/bash
if [ "$2 $3" = 'uv venv' ]; then mkdir -p .venv/bin; cp "$FAKE/train" .venv/bin/python; fi
'''
# Takes the first line of `outcomes.WORKER`: the exit status, and what it says before.
TRAINING = r'''#!/bin/bash
worker=${HOME##*/}
printf '%s\0' "$@" $'\n' >> "$FAKE/trained.$worker"
mapfile -t lines < "$FAKE/outcomes.$worker"
printf '%s\n' "${lines[@]:1}" > "$FAKE/outcomes.$worker"
read -r status message <<< "$lines"
echo "$message"
exit "$status"
'''
SLEEP = '#!/bin/bash\nif [ "$1" = 1 ]; then exec /bin/sleep 0.1; fi\nexec /bin/sleep 0.01\n'
RECORDING = '#!/bin/bash\nprintf \'%%s\\0\' "$@" $\'\\n\' >> "$FAKE/%s"\n'


class Place:
  """A repository with the launch files, and fake commands. calls(NAME): how a command was called."""

  def __init__(self, folder):
    self.fake, self.repository, commands = folder / 'fake', folder / 'repository', folder / 'bin'
    for path in (self.fake / '0', self.fake / '1', commands):
      path.mkdir(parents=True)
    shutil.copytree(ROOT / 'launch', self.repository / 'launch')
    shutil.copy(ROOT / 'setup.py', self.repository)
    (self.repository / 'experiments').mkdir()
    shutil.copy(ROOT / 'experiments/digits.py', self.repository / 'experiments')
    (self.repository / '.gitignore').write_text('.cache/\n.venv/\n')
    self.environment = os.environ | {
        'PATH': f'{commands}:{os.environ["PATH"]}', 'FAKE': str(self.fake), 'PYTHON': sys.executable}
    self.run('git', 'init', '--quiet')
    self.commit()
    recorded = {name: RECORDING % name for name in ('sbatch', 'gcsfuse', 'sudo')}
    written = recorded | {
        'gcloud': GCLOUD, 'python3': PYTHON3, 'sleep': SLEEP,
        'mountpoint': '#!/bin/bash\nexit 1\n', 'srun': RECORDING % 'srun' + 'exit "$STATUS"\n',
        'scontrol': RECORDING % 'scontrol' + 'if [ "$1" = show ]; then echo "   JobState=$STATE Reason=None"; fi\n'}
    for name, text in written.items():
      write_command(commands / name, text)
    write_command(self.fake / 'train', TRAINING)
    self.play()

  def commit(self):
    self.run('git', 'add', '--all')
    self.run('git', '-c', 'user.name=n', '-c', 'user.email=e', 'commit', '--quiet', '--allow-empty', '--message=m')

  def run(self, *command, **environment):
    return subprocess.run(command, cwd=self.repository, env=self.environment | environment, capture_output=True,
                          text=True, timeout=60)

  def play(self, states=('MISSING', 'READY'), queue=('ACTIVE',), outcomes=(('0 done',), ('0 done',))):
    """What gcloud will say, and how training will end on each worker."""
    for name, lines in [('states', states), ('queue', queue), ('outcomes.0', outcomes[0]), ('outcomes.1', outcomes[1])]:
      (self.fake / name).write_text(''.join(f'{line}\n' for line in lines))

  def pod(self, *flags, train=TRAIN):
    return self.run('bash', 'launch/tpu_pod.sh', *POD, *flags, '--', *train)

  def calls(self, name):
    path = self.fake / name
    records = path.read_text().split('\0\n\0')[:-1] if path.exists() else []
    return [record.split('\0') for record in records]

  def verbs(self):
    """What gcloud was asked to do, in order; `ssh:` with the step of the script."""
    return [steps_of(call) for call in self.calls('gcloud')]


def steps_of(call):
  if call[3] != 'ssh':
    return ' '.join(call[2:4]).replace('tpu-vm ', '').replace('queued-resources', 'queue')
  (command,) = [argument for argument in call if argument.startswith('--command=')]
  steps = {'uv venv': 'install', 'gcsfuse': 'mount', 'setsid': 'start', 'tail -n 20 -F': 'follow', 'var_jax $': 'look'}
  return 'ssh:' + next(step for part, step in steps.items() if part in command)


def write_command(path, text):
  path.write_text(text)
  path.chmod(0o755)


@pytest.fixture
def place(tmp_path):
  return Place(tmp_path)


def refused(result):
  assert result.returncode == 2, result
  assert result.stderr.startswith('error: ') and result.stderr.count('\n') == 1 and ': ' in result.stderr[7:], result
  return True


NEW = ['describe', 'create', 'scp', 'ssh:install', 'ssh:start', 'ssh:follow', 'describe', 'ssh:look']


def test_new_pod(place):
  """The whole way, in order; the workers have the commit and get the arguments as they were given."""
  result = place.pod('--spot', '--project=p', train=[*TRAIN, STRANGE])
  assert result.returncode == 0, result
  assert place.verbs() == NEW
  assert place.calls('gcloud')[1] == ['compute', 'tpus', 'tpu-vm', 'create', 'pod', '--accelerator-type=v5litepod-16',
                                      '--version=v2-alpha-tpuv5-lite', '--spot', '--zone=z', '--project=p']
  assert all('--zone=z' in call and '--project=p' in call for call in place.calls('gcloud'))
  for worker in '01':
    assert (place.fake / worker / 'var_jax/launch/tpu_pod.sh').exists()
    assert place.calls(f'trained.{worker}') == [['-m', 'var_jax', 'train', '--distributed=auto', *TRAIN, STRANGE]]
  assert 'done\n' in result.stdout  # the first worker's log


@pytest.mark.parametrize('type, version', [
    ('v5p-128', 'v2-alpha-tpuv5'), ('v6e-64', 'v2-alpha-tpuv6e'), ('v4-32', 'tpu-ubuntu2204-base')])
def test_runtime_version_follows_the_type(place, type, version):
  """A pod of the wrong runtime version has no TPUs that jax can see."""
  assert f'--version={version}' in place.pod(f'--type={type}', '--dry_run').stdout
  assert '--version=mine' in place.pod(f'--type={type}', '--version=mine', '--dry_run').stdout


def test_ready_pod_is_reused(place):
  """Nothing is created, and the commit is installed only when it is another one."""
  place.play(states=['READY'], outcomes=(['0 a', '0 b', '0 c'],) * 2)
  again = [verb for verb in NEW if verb not in ('create', 'scp', 'ssh:install')]
  for expected in (NEW, again, NEW):
    (place.fake / 'gcloud').unlink(missing_ok=True)
    assert place.pod().returncode == 0
    looked = [verb for verb in expected if verb != 'create']
    assert place.verbs() == ['describe', 'ssh:look', *looked[1:]]
    if expected == again:
      place.commit()


def hold(place, command):
  """A training that runs on both workers already."""
  for worker in '01':
    (place.fake / worker / 'var_jax_run').mkdir(exist_ok=True)
    (place.fake / worker / 'var_jax_run/command').write_text(command + '\n')
  locks = [subprocess.Popen(['flock', place.fake / worker / 'var_jax_run/lock', 'bash', '-c',
                             f'/bin/sleep 0.4; echo 0 > {place.fake / worker}/var_jax_run/status']) for worker in '01']
  while any(subprocess.run(['flock', '-n', place.fake / worker / 'var_jax_run/lock', 'true']).returncode == 0
            for worker in '01'):
    time.sleep(0.01)
  return locks


@pytest.mark.parametrize('command, expected', [(' '.join(TRAIN), 0), ('--config=else.py', 2)])
def test_training_that_runs_is_followed_not_doubled(place, command, expected):
  """Two trainings would fight for the TPUs and the workdir."""
  place.play(states=['READY'])
  locks = hold(place, command)
  result = place.pod()
  for lock in locks:
    lock.wait()
  assert result.returncode == expected, result
  if expected:
    assert place.verbs() == ['describe', 'ssh:look'] and refused(result)
  else:
    assert place.verbs()[:4] == ['describe', 'ssh:look', 'ssh:follow', 'describe']
  assert not {'ssh:start', 'ssh:install', 'scp'} & set(place.verbs()) and not place.calls('trained.0')


def test_starting_twice_starts_once(place):
  """gcloud repeats a command whose connection was lost."""
  assert place.pod().returncode == 0
  (start,) = [call[-2].partition('=')[2] for call in place.calls('gcloud') if steps_of(call) == 'ssh:start']
  locks = hold(place, ' '.join(TRAIN))
  home = place.fake / '0'
  subprocess.run(['bash', '-c', start], cwd=home, env=place.environment | {'HOME': str(home)}, check=True, timeout=10)
  assert len(place.calls('trained.0')) == 1
  for lock in locks:
    lock.wait()


def test_queued_resource(place):
  """It waits until the resource is ACTIVE, and then goes on as with any pod."""
  place.play(queue=['MISSING', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE'])
  assert place.pod('--queued').returncode == 0
  assert place.verbs() == ['describe', 'queue describe', 'queue create', *['queue describe'] * 3, *NEW[2:]]
  assert {'--node-id=pod', '--runtime-version=v2-alpha-tpuv5-lite'} <= set(place.calls('gcloud')[2])


@pytest.mark.parametrize('states, outcomes, looked', [
    (['MISSING', 'PREEMPTED', 'MISSING', 'READY'], (['143', '0'],) * 2, False),   # gcloud says so
    (['MISSING', 'MISSING', 'MISSING', 'READY'], (['143', '0'],) * 2, False),     # it is gone
    (['MISSING', 'READY', 'MISSING', 'READY'], (['143', '0'],) * 2, True),        # its workers were told to stop
    (['MISSING', 'READY', 'MISSING', 'READY'], (['75', '0'], ['134', '0']), True)])
def test_preempted_pod_is_made_anew(place, states, outcomes, looked):
  """The same command then starts on a new pod, and resumes."""
  place.play(states=states, outcomes=outcomes)
  result = place.pod()
  assert result.returncode == 0, result
  first = NEW if looked else NEW[:-1]
  assert place.verbs() == [*first, 'delete', *NEW]
  assert place.calls('trained.1') == [['-m', 'var_jax', 'train', '--distributed=auto', *TRAIN]] * 2


def test_restarts_are_limited(place):
  """What can never work must not cost money for ever."""
  place.play(states=['MISSING', 'PREEMPTED', 'MISSING', 'PREEMPTED'], outcomes=(['143', '143'],) * 2)
  result = place.pod('--restarts=1')
  assert result.returncode == 1 and place.verbs().count('create') == 2, result
  assert result.stderr.splitlines()[-1].startswith('error: it was started again 1 times')


@pytest.mark.parametrize('outcomes, status', [
    ((['2 error: no'],) * 2, 2), ((['75'], ['137']), 1), ((['0'], ['1']), 1)])
def test_training_that_fails_is_not_repeated(place, outcomes, status):
  """Bad input, and a worker's crash: shown, and the pod is left as it is."""
  place.play(outcomes=outcomes)
  result = place.pod()
  assert result.returncode == status and outcomes[0][0][2:] in result.stdout, result
  assert place.verbs() == NEW and result.stderr.splitlines()[-1].startswith('error: training ')


def test_without_network_nothing_is_deleted(place):
  """That gcloud cannot look does not mean that the pod is gone."""
  place.play(states=['MISSING', 'OFFLINE', 'OFFLINE', 'READY'])
  assert place.pod().returncode == 0
  assert 'delete' not in place.verbs() and place.verbs().count('create') == 1
  place.play(states=['OFFLINE'])
  assert place.pod().returncode == 1 and place.verbs().count('create') == 1


@pytest.mark.parametrize('flags', [(), ('--queued', '--spot', '--mount=bucket:/mnt/runs')])
def test_dry_run_of_a_pod_prints_what_is_run(place, flags):
  """It runs nothing, and its output is a script of the same commands."""
  place.play(queue=['MISSING', 'ACTIVE'])
  printed = place.pod(*flags, '--dry_run', train=[*TRAIN, STRANGE])
  assert printed.returncode == 0 and not place.calls('gcloud') and not (place.repository / '.cache').exists()
  assert place.pod(*flags, train=[*TRAIN, STRANGE]).returncode == 0
  run = place.calls('gcloud')
  (place.fake / 'gcloud').unlink()
  place.play(queue=['MISSING', 'ACTIVE'])
  place.run('bash', '-c', printed.stdout)
  assert place.calls('gcloud') == run
  if flags:  # the bucket, on both workers, before training starts; once by each of the two runs
    assert place.verbs()[-5:-3] == ['ssh:mount', 'ssh:start']
    assert [call[-2:] for call in place.calls('gcsfuse')] == [['bucket', '/mnt/runs']] * 4


def job(place, *flags, train=TRAIN):
  return place.run('bash', 'launch/slurm.sh', *JOB, *flags, '--', *train)


def installed(place):
  """A .venv whose python records what pip is asked for."""
  (place.repository / '.venv/bin').mkdir(parents=True)
  write_command(place.repository / '.venv/bin/python', RECORDING % 'pip')


def test_job_is_submitted(place):
  """One process for each GPU, SIGTERM before the time limit, and a log that the next run appends to."""
  installed(place)
  train = [TRAIN[0], '--workdir=runs/w']
  result = job(place, '--time=2-00:00:00', '--grace=300', '--partition=p', '--account=a', train=train)
  assert result.returncode == 0, result
  assert place.calls('pip')[0][-1] == '.[cuda,tfds]'
  *options, batch = place.calls('sbatch')[0]
  assert options == [
      '--job-name=var_jax', '--nodes=4', '--ntasks-per-node=8', '--gpus-per-node=8', '--cpus-per-task=8',
      '--time=2-00:00:00', '--signal=TERM@300', '--requeue', '--open-mode=append', '--output=runs/w/slurm-%j.log',
      '--partition=p', '--account=a']
  assert batch.startswith('--wrap=') and (place.repository / 'runs/w').is_dir()


@pytest.mark.parametrize('status, state, requeued', [
    (143, 'RUNNING', True), (75, 'RUNNING', True), (134, 'RUNNING', True), (138, 'RUNNING', True),
    (143, 'CANCELLED', False), (0, 'RUNNING', False),
    (2, 'RUNNING', False), (137, 'RUNNING', False)])
def test_job_that_was_asked_to_stop_queues_again(place, status, state, requeued):
  """Unless it was cancelled; when it is done, or its input bad, it ends. As Slurm runs it: by sh."""
  installed(place)
  job(place, train=[TRAIN[0], '--workdir=runs/w', STRANGE])
  batch = place.calls('sbatch')[0][-1].partition('=')[2]
  result = place.run('sh', '-c', batch, STATUS=str(status), STATE=state, SLURM_JOB_ID='7')
  assert result.returncode == status
  assert {'--kill-on-bad-exit=0', '--gpu-bind=none', '--cpus-per-task=8'} <= set(place.calls('srun')[0])
  assert place.calls('srun')[0][-7:] == [
      '-m', 'var_jax', 'train', '--distributed=auto', TRAIN[0], '--workdir=runs/w', STRANGE]
  assert (['requeue', '7'] in place.calls('scontrol')) == requeued


def test_job_that_is_preempted_queues_again(place):
  """Slurm then sends SIGTERM to the script as well, which has to wait for the training to save."""
  installed(place)
  job(place, train=[TRAIN[0], '--workdir=runs/w'])
  batch = place.calls('sbatch')[0][-1].partition('=')[2]
  write_command(place.fake.parent / 'bin/srun', '#!/bin/bash\ntrap "/bin/sleep 0.1; exit 143" TERM\necho ready\n'
                'while :; do /bin/sleep 0.01; done\n')
  process = subprocess.Popen(
      ['sh', '-c', batch], cwd=place.repository, env=place.environment | {'STATE': 'RUNNING', 'SLURM_JOB_ID': '7'},
      stdout=subprocess.PIPE, text=True, start_new_session=True)
  assert process.stdout.readline() == 'ready\n'
  os.killpg(process.pid, signal.SIGTERM)
  assert process.wait(20) == 143 and ['requeue', '7'] in place.calls('scontrol')


def test_dry_run_of_a_job_prints_what_is_run(place):
  """It installs, writes and submits nothing; its output is a script of the same commands."""
  installed(place)
  train = [TRAIN[0], '--workdir=runs/w', STRANGE]
  printed = job(place, '--dry_run', train=train)
  assert printed.returncode == 0 and not place.calls('sbatch') and not place.calls('pip')
  assert not (place.repository / 'runs').exists()
  assert job(place, train=train).returncode == 0
  place.run('bash', '-c', f'. launch/environment.sh\n{printed.stdout}')
  first, second = place.calls('sbatch')
  assert first == second


BAD = {
    'tpu_pod': [
        ['--nme=pod'], ['--name=pod'], [*POD[:2], '--type=v9-8', '--', *TRAIN], [*POD, '--name=P_d', '--', *TRAIN],
        POD, [*POD, '--'], [*POD, '--poll=soon', '--', *TRAIN], [*POD, '--mount=bucket', '--', *TRAIN],
        [*POD, '--poll=0', '--', *TRAIN], [*POD, '--zone=a b', '--', *TRAIN], [*POD, '--project=a\nb', '--', *TRAIN],
        [*POD, '--type=v5litepod-0', '--', *TRAIN], [*POD, '--', '--config=experiments/digit.py:tokenizer', TRAIN[1]],
        [*POD, '--', TRAIN[0]], [*POD, '--', TRAIN[1]], [*POD, '--', TRAIN[0], '--workdir=gs://bucket/w'],
        [*POD, '--', TRAIN[0], '--workdir=runs/w'], [*POD, '--', *TRAIN, '--distributed=auto']],
    'slurm': [
        ['--node=4'], ['--nodes=4', '--', *TRAIN], [*JOB, '--nodes=0', '--', *TRAIN], JOB, [*JOB, '--'],
        [*JOB, '--time=long', '--', *TRAIN], [*JOB, '--', TRAIN[0]], [*JOB, '--', TRAIN[1]],
        [*JOB, '--partition=a b', '--', *TRAIN], [*JOB, '--name=a\nb', '--', *TRAIN],
        [*JOB, '--', '--config=experiments/digit.py:tokenizer', TRAIN[1]],
        *([*JOB, f'--time={limit}', '--grace=120', '--', *TRAIN] for limit in ('2', '0:30', '0:1:59', '0-0:2')),
        [*JOB, '--', TRAIN[0], '--workdir=gs://bucket/w'], [*JOB, '--', *TRAIN, '--distributed=auto']]}


@pytest.mark.parametrize('script', BAD)
def test_bad_flags_are_refused(place, script):
  """In one line that says what to do, before anything is run."""
  for flags in BAD[script]:
    assert refused(place.run('bash', f'launch/{script}.sh', *flags)), flags
  assert not place.calls('gcloud') and not place.calls('sbatch')


def test_job_without_slurm_is_refused(place):
  """Before .venv is made, which takes minutes."""
  (place.fake.parent / 'bin/sbatch').unlink()
  assert refused(job(place)) and not (place.repository / '.venv').exists()
  assert job(place, '--dry_run', '--time=0').returncode == 0  # 0: without end


def test_pod_gets_what_is_committed(place):
  """A config that is only here would be missing on every worker."""
  shutil.copy(ROOT / 'experiments/digits.py', place.repository / 'experiments/mine.py')
  train = ['--config=experiments/mine.py:tokenizer', TRAIN[1]]
  assert refused(place.pod(train=train)) and not place.calls('gcloud')
  place.commit()
  assert place.pod(train=train).returncode == 0


@pytest.mark.parametrize('flag, words', [
    ('--mount=My-Bucket:/mnt/b', 'no capitals'), ('--mount=gs://bucket:/mnt/b', 'without'),
    ('--mount=bucket:mnt', 'BUCKET:/DIR'), ('--name=' + 'p' * 64, '63 at most')])
def test_names_that_no_pod_or_bucket_has_are_told_why(place, flag, words):
  done = place.pod(flag)
  assert refused(done) and words in done.stderr and not place.calls('gcloud')


@pytest.mark.parametrize('name', ['data.path', 'tokenizer', 'start_from', 'loss.lpips_weights', 'measure.inception'])
def test_files_of_a_pods_training_are_absolute(place, name):
  """A relative path, or one in the home, is another file on every worker; so is the second of two."""
  for value in ('runs/t', '~/t', 'gs://b/t', *(['/mnt/a,b'] if 'lpips' in name else [])):
    done = place.pod(train=[*TRAIN, f'--config.{name}={value}'])
    assert refused(done) and 'on every worker' in done.stderr
  assert not place.calls('gcloud')
  assert place.pod(train=[*TRAIN, f'--config.{name}=/mnt/t']).returncode == 0


def test_workdir_in_the_home_of_a_cluster(place, tmp_path):
  """No shell expands ~ within --workdir=~/w; a pod's workers have homes of their own."""
  train, home = [TRAIN[0], '--workdir=~/w'], {'HOME': str(tmp_path)}
  done = place.run('bash', 'launch/slurm.sh', *JOB, '--dry_run', '--', *train, **home)
  assert done.returncode == 0 and f'mkdir -p {tmp_path}/w' in done.stdout and "'--workdir=~/w'" in done.stdout
  done = place.pod(train=train)
  assert refused(done) and 'absolute' in done.stderr
  done = place.run('bash', 'launch/slurm.sh', *JOB, '--', TRAIN[0], '--workdir=~x/w')
  assert refused(done) and "another user's home" in done.stderr


@pytest.mark.parametrize('script', ['tpu_pod', 'slurm'])
def test_help_names_every_flag(place, script):
  """What is not in the help does not exist for its reader."""
  result = place.run('bash', f'launch/{script}.sh', '--help')
  assert result.returncode == 0 and 'example:' in result.stdout and 'set -' not in result.stdout
  flags = set(re.findall(r'(?<=[ |(])--[a-z_]+(?==[?*]|\)|=\*)', (ROOT / f'launch/{script}.sh').read_text()))
  assert len(flags) > 8 and all(flag in result.stdout for flag in flags - {'--config', '--workdir', '--distributed'})


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_sound(script):
  """A script that needs a pod to fail is found out too late."""
  subprocess.run(['bash', '-n', script], check=True)
  shellcheck = pathlib.Path(sys.executable).with_name('shellcheck')  # of the same environment
  checked = subprocess.run([shellcheck, '-x', '--shell=bash', script], cwd=ROOT, capture_output=True, text=True)
  assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize('name', sorted(p.name for p in ROOT.glob('launch/*.py') if '__main__' in p.read_text()))
def test_python_scripts_look_for_the_environment_first(name):
  """All but the one that a server may have alone."""
  text = (ROOT / 'launch' / name).read_text()
  if name != 'run_artifact.py':
    assert text.index("if __name__ == '__main__':\n  import environment") < text.index('import', text.index('"""', 3))


def test_python_scripts_find_the_environment_of_their_repository(tmp_path):
  """Called by any Python, from any folder. Without one they say what to do."""
  (tmp_path / 'launch').mkdir()
  shutil.copy(ROOT / 'launch/environment.py', tmp_path / 'launch')
  (tmp_path / 'launch/script.py').write_text('import environment')
  command = [sys.executable, '-S', tmp_path / 'launch/script.py', '--a=b c']  # -S: without what is installed
  done = subprocess.run(command, cwd='/', capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr.startswith('error: var_jax is not installed')
  (tmp_path / '.venv/bin').mkdir(parents=True)
  write_command(tmp_path / '.venv/bin/python', '#!/bin/bash\nprintf "%s\\n" "$@"\n')
  done = subprocess.run(command, cwd='/', capture_output=True, text=True)
  assert done.stdout.splitlines() == [f'{tmp_path}/launch/script.py', '--a=b c'] and done.returncode == 0


def test_installed_package_has_the_experiments(tmp_path):
  """They are what `--config=experiments/digits.py` means away from a checkout."""
  pytest.importorskip('setuptools')
  subprocess.run([sys.executable, 'setup.py', '--quiet', 'build_py', f'--build-lib={tmp_path}'], cwd=ROOT, check=True,
                 capture_output=True)
  packed = {p.name for p in tmp_path.glob('var_jax/experiments/*.py')}
  assert packed == {p.name for p in ROOT.glob('experiments/*.py')} and 'digits.py' in packed


@pytest.fixture(scope='module')
def job_sets():
  yaml = pytest.importorskip('yaml')
  return {document['metadata']['name']: document
          for document in yaml.safe_load_all((ROOT / 'launch/kubernetes.yaml').read_text())}


def job_of(job_set):
  (job,) = job_set['spec']['replicatedJobs']
  pod = job['template']['spec']['template']['spec']
  (container,) = pod['containers']
  return job['template']['spec'], pod, container


@pytest.mark.parametrize('name, resource', [('var-tpu', 'google.com/tpu'), ('var-gpu', 'nvidia.com/gpu')])
def test_job_sets_restart_together(job_sets, name, resource):
  """All pods restart after one is lost, none after bad input, and they have the time and the place to save."""
  job_set = job_sets[name]
  job, pod, container = job_of(job_set)
  assert job_set['apiVersion'] == 'jobset.x-k8s.io/v1alpha2' and job_set['kind'] == 'JobSet'
  policy = job_set['spec']['failurePolicy']
  assert policy['maxRestarts'] >= 10 and policy['restartStrategy'] == 'BlockingRecreate'
  assert [(rule['action'], rule['onJobFailureReasons']) for rule in policy['rules']] == [
      ('FailJobSet', ['PodFailurePolicy'])]
  (rule,) = job['podFailurePolicy']['rules']
  assert rule['action'] == 'FailJob' and rule['onExitCodes'] == {
      'containerName': container['name'], 'operator': 'In', 'values': [2]}
  assert job['backoffLimit'] == 0 and pod['restartPolicy'] == 'Never'  # which podFailurePolicy asks for
  assert job['completionMode'] == 'Indexed' and job['parallelism'] == job['completions']
  assert pod['terminationGracePeriodSeconds'] >= 120
  volumes = {volume['name']: volume for volume in pod['volumes']}
  (place,) = [mount['mountPath'] for mount in container['volumeMounts']
              if 'persistentVolumeClaim' in volumes[mount['name']]]
  assert any(argument.startswith(f'--workdir={place}/') for argument in container['args'])
  assert container['resources']['limits'] == container['resources']['requests']
  assert list(container['resources']['limits']) == [resource]


def test_job_sets_name_what_runs_the_processes(job_sets):
  """A TPU pod is told by GKE who it is; a GPU pod by the address of the pod with index 0, as JobSet names it."""
  job, pod, container = job_of(job_sets['var-tpu'])
  rows, columns = map(int, pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x'))
  assert job['parallelism'] * container['resources']['limits']['google.com/tpu'] == rows * columns
  job, pod, container = job_of(job_sets['var-gpu'])
  values = {variable['name']: variable['value'] for variable in container['env']}
  replicated = job_sets['var-gpu']['spec']['replicatedJobs'][0]['name']
  address, _, port = values['FIRST'].partition(':')
  assert address == f'var-gpu-{replicated}-0-0.var-gpu'
  assert int(port) in [entry['containerPort'] for entry in container['ports']]
  assert values['NODES'] == str(job['parallelism'])
  for name, how in [('var-tpu', 'auto'), ('var-gpu', '$(FIRST),$(NODES),$(JOB_COMPLETION_INDEX)')]:
    _, _, container = job_of(job_sets[name])  # no shell between, so that signals and exit statuses arrive
    assert container['command'] == ['python', '-m', 'var_jax', 'train', f'--distributed={how}']
