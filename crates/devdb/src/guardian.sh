# Cleans up when the process that started it ends. The kernel closes the pipe to this shell even
# after `kill -9`.
trap '' HUP INT TERM
read -r _

case $1 in
private)
    folder=$2 pg_ctl=$3
    # Repeats until the folder is gone: a running `initdb` or start may still write to it.
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        if [ -e "$folder/data/postmaster.pid" ]; then
            "$pg_ctl" stop -D "$folder/data" -m immediate -t 10
        fi
        rm -rf "$folder"
        [ -e "$folder" ] || exit 0
        sleep 0.5
    done
    ;;
shared)
    # The password is in PGPASSWORD, which other users can't see.
    prefix=$2 psql=$3 url=$4
    "$psql" -XAtq -d "$url" -c "SELECT datname FROM pg_database WHERE starts_with(datname, '$prefix')" |
        while read -r name; do
            "$psql" -Xq -d "$url" -c "DROP DATABASE IF EXISTS $name WITH (FORCE)" </dev/null
        done
    ;;
esac
