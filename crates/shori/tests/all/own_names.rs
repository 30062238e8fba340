//! Tables whose columns have the names of a history's own.

use crate::harness::World;

const SOURCE: &str = "
create table contracts (
    Valid_From text not null,
    batch_id integer not null,
    valid_to text,
    is_current integer,
    cdc_operation text,
    cdc_timestamp text,
    surrogate_key integer,
    created_at text,
    updated_at text,
    __source_lsn text,
    note text,
    note__source text,
    primary key (Valid_From, batch_id)
);
insert into contracts values ('a', 1, 'end', 0, 'their own', 'noon', 70, 'then', 'later', 'l', 'n', 's');
";

const CONFIGURATION: &str = r#"
[pipeline]
name = "names"
[[source]]
name = "here"
kind = "sqlite"
path = "source.db"
[source.tables.contracts]
[[store]]
name = "serving"
kind = "duckdb"
path = "serving.duckdb"
[[projection]]
name = "contracts_history"
kind = "history"
table = "contracts"
[[projection]]
name = "contracts_keyed"
kind = "history"
table = "contracts"
key = ["began", "batch"]
"#;

#[test]
fn columns_with_the_names_of_a_historys_own_are_published_beside_them() {
    let world = World::configured(CONFIGURATION, &[], SOURCE);
    world.succeed(&["check"]);
    world.succeed(&["run", "--once"]);
    world.verify();
    world.write(
        "update contracts set valid_to = 'open', is_current = 1, updated_at = 'now' where batch_id = 1;
        insert into contracts values ('a', 2, null, null, null, null, null, null, null, null, null, null);
        insert into contracts values ('b', 3, 'x', 1, 'y', 'z', 3, 'c', 'u', 'l', 'n', 's');
        delete from contracts where batch_id = 3;",
    );
    world.succeed(&["run", "--once"]);
    world.verify();
    let versions = "select Valid_From__source, batch_id__source, valid_to__source, is_current__source,
        cdc_operation__source, cdc_timestamp__source, surrogate_key__source, created_at__source, updated_at__source,
        __source_lsn__source, note, note__source, is_current, cdc_operation
        from contracts_history order by 2, valid_from";
    let rows = world.query(versions).into_iter().map(|row| {
        let texts: Vec<String> = row.into_iter().map(|value| value.unwrap_or("-".into())).collect();
        texts.join(" ")
    });
    let rows: Vec<String> = rows.collect();
    assert_eq!(
        rows,
        [
            "a 1 end 0 their own noon 70 then later l n s false SNAPSHOT",
            "a 1 open 1 their own noon 70 then now l n s true UPDATE",
            "a 2 - - - - - - - - - - true INSERT",
            "b 3 x 1 y z 3 c u l n s false INSERT",
        ]
    );
    assert_eq!(world.value("select count(*) from contracts_keyed where is_current"), "2");
    // A rebuild writes them by another way, and what is wrong is found.
    world.succeed(&["rebuild", "contracts_history"]);
    world.succeed(&["run", "--once"]);
    world.verify();
    world.damage("contracts_history", "update TARGET set valid_to__source = 'no' where is_current");
    let done = world.shori(&["verify"]);
    assert!(done.status == Some(1) && done.out.contains("valid_to"), "{done:?}");
}

#[test]
fn a_column_whose_name_cannot_be_kept_is_refused_and_its_neighbours_go_on() {
    let neighbour = CONFIGURATION.replace("[[store]]", "[source.tables.taken]\n[[store]]");
    for column in ["rowid", "RowID", "__lsn"] {
        let source = format!("{SOURCE} create table taken (id integer primary key, {column} text);");
        let world = World::configured(&neighbour, &[], &source);
        world.shori(&["check"]).tells(1, &["table taken", column, "rename the column in the source"]);
        let done = world.shori(&["run", "--once"]);
        assert!(done.err.contains("table taken") && done.err.contains(column), "{done:?}");
        assert_eq!(world.value("select count(*) from contracts_history"), "1");
    }
}

#[test]
fn a_history_whose_key_does_not_fit_its_table_is_refused() {
    for (key, cause) in [
        (r#"["began"]"#, "its key names 1 columns, and the table's key is (Valid_From, batch_id)"),
        (r#"["began", "batch", "more"]"#, "its key names 3 columns"),
        (r#"["began", "note"]"#, "two of its columns would be called note"),
        (r#"["began", "Began"]"#, "two of its columns would be called began"),
        (r#"["began", "ROWID"]"#, "no column of it may be called rowid"),
    ] {
        let world = World::configured(&CONFIGURATION.replace(r#"["began", "batch"]"#, key), &[], SOURCE);
        for verb in [&["check"][..], &["run", "--once"]] {
            let done = world.shori(verb);
            let told = done.err.lines().find(|line| line.contains("projection contracts_keyed"));
            assert!(done.status == Some(1) && told.is_some_and(|line| line.contains(cause)), "{key}: {done:?}");
        }
        assert_eq!(world.value("select count(*) from contracts_history"), "1", "{key}");
    }
}
