# For other scripts to source: an apt with lists of its own, from the mirrors that this machine already
# uses, so that an ordinary user can download packages and nothing of the system changes.
#
#   own_apt FOLDER        then sources go to FOLDER/parts, and `APT_CONFIG=FOLDER/apt.conf apt-get …`
own_apt() {
  mkdir -p "$1/parts" "$1/lists/partial" "$1/archives/partial"
  cat > "$1/apt.conf" <<CONF
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$1/parts";
Dir::State::lists "$1/lists";
Dir::Cache "$1";
APT::Sandbox::User "$(id -un)";
CONF
}
