# Two images: `docker build --target backend .` for the example backend, and without a target the
# binary bruhmcp-db, which migrates. Both hold one program, run as an ordinary user, and need no
# libpq: it is linked in.
FROM rust:1-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --locked --release --features cli,bundled --bin bruhmcp-db

FROM build AS build-backend
RUN cargo build --locked --release --features migrator,r2d2,bundled --example backend

FROM gcr.io/distroless/cc-debian12:nonroot AS backend
COPY --from=build-backend /src/target/release/examples/backend /usr/local/bin/backend
ENTRYPOINT ["/usr/local/bin/backend"]

FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /src/target/release/bruhmcp-db /usr/local/bin/bruhmcp-db
ENTRYPOINT ["/usr/local/bin/bruhmcp-db"]
CMD ["status"]
