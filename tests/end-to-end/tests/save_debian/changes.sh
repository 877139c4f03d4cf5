# Changes of all kinds to a small Debian, and new files beside.
set -e
echo changed >> /etc/issue
chmod 4711 /usr/bin/yes
chown 7:8 /usr/bin/tac
touch /usr/bin/factor
rm /etc/debian_version
rm -r /usr/share/common-licenses
mv /usr/bin/tsort /usr/bin/tsort.moved
mv /etc/skel /etc/skel.moved
# One kind replaced by another, and back.
rm -r /usr/share/base-files; echo file > /usr/share/base-files
rm /etc/issue.net; mkdir /etc/issue.net; echo in > /etc/issue.net/file
rm /etc/os-release; mkdir /etc/os-release
rm -r /etc/cron.daily; ln -s elsewhere /etc/cron.daily
rm -r /usr/lib/terminfo; mkfifo /usr/lib/terminfo
cp -a /etc/pam.d /tmp/pam.d
rm -r /etc/pam.d; echo file > /etc/pam.d; rm /etc/pam.d
cp -a /tmp/pam.d /etc/pam.d; echo '# changed' >> /etc/pam.d/other
cp -a /etc/security /tmp/security
rm -r /etc/security; ln -s elsewhere /etc/security; rm /etc/security
cp -a /tmp/security /etc/security
# Other names of files of the image, of which some have two there, and of new ones.
ln /usr/bin/perlbug /usr/bin/perlbug.link
chmod 700 /usr/bin/perlthanks
ln /usr/bin/sum /srv/sum
ln /usr/bin/tac /srv/tac
ln -f /usr/bin/comm /usr/bin/join
mkdir -p /srv/a /srv/b
echo linked > /srv/b/first; ln /srv/b/first /srv/a/second; ln /srv/b/first /srv/third
# As a package manager would.
sed -i '/^Package: dash$/,/^$/s/^Version: .*/&+changed/' /var/lib/dpkg/status
printf 'Package: new\nStatus: install ok installed\nVersion: 1\nArchitecture: all\n\n' \
  >> /var/lib/dpkg/status
printf '/.\n/usr/bin/new\n' > /var/lib/dpkg/info/new.list
cp -p /var/lib/dpkg/status /var/lib/dpkg/status-old
# Files of all kinds.
cd /srv
mkfifo fifo; chmod 640 fifo
mkdir empty sticky; chmod 1777 sticky
for mode in 4755 2755 6755 1644 0000; do echo $mode > mode-$mode; chmod $mode mode-$mode; done
mkdir setgid; chmod 2775 setgid; echo in > setgid/file
echo owned > owned; chown 1234:65534 owned; mkdir home; chown -h 1000:1000 home
ln -s /nowhere dangling; ln -s "$(printf 'long%.0s' $(seq 100))" long; chown -h 5:6 dangling
truncate -s 0 nothing; truncate -s 1M hole
truncate -s 64M sparse; echo mid | dd of=sparse bs=1M seek=32 conv=notrunc 2> /dev/null
printf end | dd of=sparse bs=1 seek=67108861 conv=notrunc 2> /dev/null
seq 500000 > large
touch -d '1999-12-31 23:59:59' old; touch -d '2100-01-01' future; touch -d '1960-01-01' older
echo volatile > /tmp/volatile; echo volatile > /run/volatile; echo volatile > /etc/hosts
