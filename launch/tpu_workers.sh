# Sourced by tpu_pod.sh: what is done on the pod's workers, all by gcloud's ssh.
# shellcheck disable=SC2154  # flags and the commit are tpu_pod.sh's

GCSFUSE=https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v3.4.0/gcsfuse_3.4.0_amd64.deb

# on_workers all|INDEX COMMAND. A connection that is lost silently ends after two minutes.
on_workers() {
  tpus tpu-vm ssh "$name" --worker="$1" --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4 \
    --command="$2"
}

# On the workers, var_jax/ is the repository. var_jax_run/ has lock (held while training runs), command, log, status
# (the exit status of the last training) and commit (which is installed).

# uv brings a Python 3.11 where the image has an older one only, as those with Ubuntu 22.04 do.
install() {
  git diff --quiet HEAD || note 'changes that are not committed are not copied'
  run mkdir -p .cache || return
  run git archive --format=tar.gz --output=.cache/var_jax.tar.gz "$commit" || return
  tpus tpu-vm scp .cache/var_jax.tar.gz "$name:var_jax.tar.gz" --worker=all || return
  on_workers all "set -e
rm -rf var_jax
mkdir -p var_jax var_jax_run
tar -xzf var_jax.tar.gz -C var_jax
cd var_jax
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --python 3.11 .venv
python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu,tfds]'
echo $commit > ../var_jax_run/commit"
}

# The flags: a checkpoint becomes valid by renaming its folder, and no worker may go by what it saw before.
mount_bucket() {
  local bucket=${mount%%:*} folder=${mount#*:}
  on_workers all "set -e
if ! mountpoint -q $folder; then
  if ! command -v gcsfuse > /dev/null; then
    curl -fsSLo gcsfuse.deb $GCSFUSE
    sudo apt-get -o DPkg::Lock::Timeout=300 install -y ./gcsfuse.deb
  fi
  sudo mkdir -p $folder
  sudo chown \$USER $folder
  gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 \
--metadata-cache-negative-ttl-secs=0 $bucket $folder
fi"
}

# In a session of its own, so that it does not end with the connection. Where one runs already, nothing happens.
start() {
  on_workers all "set -e
cd var_jax_run
if flock -n lock true; then
  rm -f status started
  echo '$training' > command
  setsid nohup flock -n lock bash -c 'touch started
cd ../var_jax
.venv/bin/python -m var_jax train --distributed=auto $training
echo \$? > ../var_jax_run/status' >> log 2>&1 < /dev/null &
  until [ -e started ]; do sleep 0.2; done
fi"
}

# The first worker's log, until the training there ends.
follow() {
  on_workers 0 "cd var_jax_run
tail -n 20 -F log &
flock lock true
sleep 1
kill \$!"
}

# Sets `lines`, one for each worker: `var_jax STATE COMMIT `. STATE: running, other (another training runs), none (it
# never ran, or its machine was lost), or the exit status.
look() {
  lines=$(on_workers all "mkdir -p var_jax_run
cd var_jax_run
state=none
if ! flock -n lock true; then
  state=running
  [ \"\$(cat command)\" = '$training' ] || state=other
elif [ -e status ]; then
  state=\$(cat status)
fi
echo \"var_jax \$state \$(cat commit 2> /dev/null) \"") || return
  lines=$(grep '^var_jax ' <<< "$lines") || [ -n "$dry_run" ]
}
